package starcast.peer;

import com.sun.management.OperatingSystemMXBean;
import java.lang.management.ManagementFactory;
import java.util.ArrayList;
import java.util.List;

/** Marks as bench/peers/work.py takes them: each at the first beginning of a call at least so many events on. */
final class Pace {
    /** How far the program was; processor time is that of all its threads. */
    record Mark(long events, double seconds, double cpuSeconds) {}

    private final long from; // events before are not measured
    private final long every;
    private final OperatingSystemMXBean system =
            (OperatingSystemMXBean) ManagementFactory.getOperatingSystemMXBean();
    final List<Mark> marks = new ArrayList<>();
    private long begun;
    private long ended;
    private long calls;

    Pace(long from, long every) {
        this.from = from;
        this.every = every;
    }

    synchronized void begin(int events) {
        if (marks.isEmpty() ? begun >= from : begun - marks.get(marks.size() - 1).events() >= every) {
            marks.add(new Mark(begun, System.nanoTime() / 1e9, system.getProcessCpuTime() / 1e9));
        }
        begun += events;
        calls++;
    }

    synchronized void end(int events) {
        ended += events;
    }

    /** Events that have been answered. */
    synchronized long ended() {
        return ended;
    }

    synchronized long calls() {
        return calls;
    }
}
