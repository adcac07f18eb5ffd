package starcast.peer;

import ai.onnxruntime.OrtException;
import java.io.IOException;
import java.io.UncheckedIOException;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import org.apache.kafka.streams.processor.PunctuationType;
import org.apache.kafka.streams.processor.api.Processor;
import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.processor.api.RecordMetadata;
import org.apache.kafka.streams.state.KeyValueIterator;
import org.apache.kafka.streams.state.KeyValueStore;

/**
 * Scores one partition. Kafka Streams hands over one record at a time, and may commit between any
 * two; so that several share a call of the network and yet none is lost, those that wait stand in a
 * state store of their own, which is committed with their offsets.
 */
final class Scoring implements Processor<byte[], byte[], byte[], byte[]> {
    static final String USERS = "users";
    static final String PARTITIONS = "partitions";
    static final String WAITING = "waiting";

    private final Model model;
    private final Pace pace;
    private final int most;
    private final Scorer scorer;
    private final List<Event> events = new ArrayList<>();
    private final List<Long> timestamps = new ArrayList<>();
    private ProcessorContext<byte[], byte[]> context;
    private KeyValueStore<Long, byte[]> users;
    private KeyValueStore<Integer, byte[]> partitions;
    private KeyValueStore<Integer, byte[]> waiting; // by position in the batch
    private Row partition;

    Scoring(Model model, Pace pace) {
        this.model = model;
        this.pace = pace;
        most = Math.max(1, model.settings.batch() / model.settings.partitions());
        scorer = new Scorer(model, most);
    }

    @Override
    public void init(ProcessorContext<byte[], byte[]> context) {
        this.context = context;
        users = context.getStateStore(USERS);
        partitions = context.getStateStore(PARTITIONS);
        waiting = context.getStateStore(WAITING);
        int number = context.taskId().partition();
        byte[] stored = partitions.get(number);
        partition = stored == null
                ? model.lookups.partitions.copy(number)
                : Row.of(stored, 0, stored.length, Row.PARTITION);
        try (KeyValueIterator<Integer, byte[]> left = waiting.all()) {
            left.forEachRemaining(each -> take(each.value));
        }
        Duration longest = Duration.ofMillis(model.settings.gatherMs());
        context.schedule(longest, PunctuationType.WALL_CLOCK_TIME, now -> flush());
    }

    @Override
    public void process(Record<byte[], byte[]> record) {
        RecordMetadata from = context.recordMetadata().orElseThrow();
        String topic = from.topic().substring(model.settings.prefix().length());
        byte[] name = topic.getBytes(StandardCharsets.UTF_8);
        byte[] entry = ByteBuffer.allocate(1 + name.length + 16 + record.value().length)
                .put((byte) name.length)
                .put(name)
                .putLong(from.offset())
                .putLong(record.timestamp())
                .put(record.value())
                .array();
        waiting.put(events.size(), entry);
        take(entry);
        if (events.size() == most) {
            flush();
        }
    }

    /** Take an event in that stands in the store. */
    private void take(byte[] entry) {
        ByteBuffer read = ByteBuffer.wrap(entry);
        byte[] name = new byte[read.get()];
        read.get(name);
        String topic = new String(name, StandardCharsets.UTF_8);
        long offset = read.getLong();
        long timestamp = read.getLong();
        byte[] value = Arrays.copyOfRange(entry, read.position(), entry.length);
        try {
            events.add(new Event(topic, context.taskId().partition(), offset, value));
        } catch (IOException error) {
            throw new UncheckedIOException(topic + " offset " + offset + ": " + error.getMessage(), error);
        }
        timestamps.add(timestamp);
    }

    /** Answer all that waits. */
    private void flush() {
        if (events.isEmpty()) {
            return;
        }
        pace.begin(events.size());
        List<Scorer.Answer> answers;
        try {
            answers = scorer.score(events, partition, new Stored());
        } catch (OrtException | IOException error) {
            throw new IllegalStateException(error);
        }
        partitions.put(context.taskId().partition(), partition.stored());
        for (int at = 0; at < answers.size(); at++) {
            byte[] key = answers.get(at).event().userId.getBytes(StandardCharsets.UTF_8);
            context.forward(new Record<>(key, answers.get(at).value(), timestamps.get(at)));
            waiting.delete(at);
        }
        events.clear();
        timestamps.clear();
        pace.end(answers.size());
    }

    private final class Stored implements Scorer.Users {
        @Override
        public byte[] get(long user) {
            return users.get(user);
        }

        @Override
        public void put(long user, byte[] row) {
            users.put(user, row);
        }
    }
}
