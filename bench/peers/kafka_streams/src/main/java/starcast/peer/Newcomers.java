package starcast.peer;

/** What model/newcomers.py does with a partition's row. */
final class Newcomers {
    private static final double DOUBT = 5;
    private static final double BELIEF = 0.01;
    private static final double TURN = 1e-3;
    private static final double FORGETTING = 0.999;
    private static final double FADE = Math.pow(0.5, 1 / 20.0);

    // Where a PARTITION row has what.
    private static final int LATE_SUM = 72;
    private static final int LATE_WEIGHT = 80;
    private static final int STORM = 88;
    private static final int ERROR_SUM = 96;
    private static final int ERROR_COUNT = 104;

    private Newcomers() {}

    static double level(Row partition) {
        return (partition.f8(STORM) + BELIEF) * partition.f8(LATE_SUM) / (partition.f8(LATE_WEIGHT) + DOUBT);
    }

    /** One more first rating, off by {@code error} stars. */
    static void learn(Row partition, double error) {
        double sum = partition.f8(LATE_SUM);
        double weight = partition.f8(LATE_WEIGHT);
        double left = error - sum / (weight + DOUBT);
        double variance = (1 + partition.f8(ERROR_SUM)) / (1 + partition.f8(ERROR_COUNT));
        double odds = Math.exp((error * error - left * left) / (2 * variance));
        double belief = partition.f8(STORM) + BELIEF;
        belief = belief * odds / (belief * odds + 1 - belief);
        partition.f8(STORM, (1 - TURN) * (belief - BELIEF));
        partition.f8(LATE_SUM, FADE * sum + error);
        partition.f8(LATE_WEIGHT, FADE * weight + 1);
        partition.f8(ERROR_SUM, FORGETTING * partition.f8(ERROR_SUM) + error * error);
        partition.f8(ERROR_COUNT, FORGETTING * partition.f8(ERROR_COUNT) + 1);
    }
}
