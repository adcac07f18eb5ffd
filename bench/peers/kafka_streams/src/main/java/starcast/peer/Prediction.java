package starcast.peer;

/**
 * What is said of an event: model/calibration.py with model/distribution.py. The distribution is
 * the tilt of what the network says whose mean is the rating.
 */
final class Prediction {
    static final String[] TIERS = {"global", "item_text", "item_state", "user_state", "full"};
    private static final double LOWEST = 1.02;
    private static final double HIGHEST = 4.98;
    private static final double LARGEST_LOGIT = 5;
    private static final double LARGEST_TILT = 2 * LARGEST_LOGIT + 6;
    private static final int MOST_STEPS = 60;
    private static final double SETTLED = 1e-6;

    final float rating;
    final float[] distribution = new float[User.STARS];
    final float low;
    final float high;
    final String tier;

    Prediction(float[] outputs, int at, float[] features, int begin, Settings settings) {
        double mean = clamp(settings.intercept() + settings.slope() * outputs[at], LOWEST, HIGHEST);
        double[] shares = new double[User.STARS];
        for (int star = 0; star < User.STARS; star++) {
            shares[star] = outputs[at + 1 + star] / settings.temperature();
        }
        tilt(shares, mean);
        double reached = 0;
        for (int star = 0; star < User.STARS; star++) {
            reached += shares[star] * (star + 1);
        }
        double variance = 0;
        for (int star = 0; star < User.STARS; star++) {
            variance += shares[star] * (star + 1 - reached) * (star + 1 - reached);
            distribution[star] = (float) shares[star];
        }
        double margin = settings.interval() * Math.sqrt(variance);
        rating = (float) mean;
        low = (float) Math.max(mean - margin, 1);
        high = (float) Math.min(mean + margin, User.STARS);
        tier = TIERS[tier(features, begin)];
    }

    /** How much is known of user and item, as model/ladder.py has it. */
    private static int tier(float[] features, int begin) {
        boolean user = features[begin + Features.USER_EVENTS] > 0;
        boolean item = features[begin + Features.ITEM_EVENTS] > 0;
        boolean text = features[begin + Features.TEXT_KNOWN] > 0 || features[begin + Features.ITEM_KNOWN] > 0;
        return user ? item ? 4 : 3 : item ? 2 : text ? 1 : 0;
    }

    /** Logits to the shares of their tilt with a mean. */
    private static void tilt(double[] logits, double mean) {
        double middle = 0;
        for (double logit : logits) {
            middle += logit / logits.length;
        }
        for (int star = 0; star < logits.length; star++) {
            logits[star] = clamp(logits[star] - middle, -LARGEST_LOGIT, LARGEST_LOGIT);
        }
        double theta = solve(logits, mean);
        double total = 0;
        for (int star = 0; star < logits.length; star++) {
            logits[star] = Math.exp(logits[star] + theta * (star + 1 - mean)); // the mean: against overflow
            total += logits[star];
        }
        for (int star = 0; star < logits.length; star++) {
            logits[star] /= total;
        }
    }

    /** By Newton's method on the log odds of the mean, bisecting where a step does not help. */
    private static double solve(double[] logits, double mean) {
        int count = logits.length;
        double target = Math.log((mean - 1) / (count - mean));
        double low = -LARGEST_TILT;
        double high = LARGEST_TILT;
        double last = Double.POSITIVE_INFINITY;
        double found = 0;
        double[] shares = new double[count];
        for (int step = 0; step < MOST_STEPS; step++) {
            double largest = Double.NEGATIVE_INFINITY;
            for (int star = 0; star < count; star++) {
                shares[star] = logits[star] + found * (star + 1);
                largest = Math.max(largest, shares[star]);
            }
            double total = 0;
            double above = 0;
            for (int star = 0; star < count; star++) {
                shares[star] = Math.exp(shares[star] - largest);
                total += shares[star];
                above += shares[star] * star;
            }
            above /= total;
            double below = count - 1 - above;
            double error = Math.log(above / below) - target;
            if (Math.abs(error) < SETTLED) {
                break;
            }
            if (error < 0) {
                low = found;
            } else {
                high = found;
            }
            double variance = 0;
            for (int star = 0; star < count; star++) {
                variance += shares[star] / total * (star - above) * (star - above);
            }
            found -= error * above * below / ((count - 1) * variance);
            if (!(low < found && found < high) || Math.abs(error) >= last / 2) {
                found = (low + high) / 2;
            }
            last = Math.abs(error);
        }
        return found;
    }

    private static double clamp(double value, double lowest, double highest) {
        return Math.min(Math.max(value, lowest), highest);
    }
}
