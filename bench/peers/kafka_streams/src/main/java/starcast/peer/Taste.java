package starcast.peer;

import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.FloatBuffer;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Arrays;

/** What a user's ratings say of an item through factors: the columns of model/taste.py. */
final class Taste {
    static final int COLUMNS = 4;
    private static final double RIDGE = 5;

    private final int count; // factors
    private final float[] factors; // of buckets
    private final float[] offsets;
    private final double level;
    private final double[][] gram;
    private final double[] person;

    /** From a file of offsets and then factors by bucket. */
    Taste(Path file, int buckets, int count, double level) throws IOException {
        FloatBuffer numbers =
                ByteBuffer.wrap(Files.readAllBytes(file)).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer();
        this.count = count;
        this.level = level;
        offsets = new float[buckets];
        factors = new float[buckets * count];
        numbers.get(offsets).get(factors);
        gram = new double[count][count];
        person = new double[count];
    }

    private Taste(Taste other) {
        count = other.count;
        factors = other.factors;
        offsets = other.offsets;
        level = other.level;
        gram = new double[count][count];
        person = new double[count];
    }

    /** The same numbers for another thread. */
    Taste shared() {
        return new Taste(this);
    }

    /** Write the columns of an item (a bucket) for a user from {@code begin} on. */
    void fold(Row user, int buckets, int item, double userBias, float[] into, int begin) {
        for (int at = 0; at < count; at++) {
            person[at] = 0;
            Arrays.fill(gram[at], 0);
        }
        double bias = Double.isNaN(userBias) ? 0 : userBias;
        int known = 0;
        for (int recent = 0; recent < User.RECENT; recent++) {
            int slot = User.slot(recent);
            int rating = user.u1(slot + User.SLOT_RATING);
            if (rating > 0) {
                known += rate(Model.bucket(user.u4(slot + User.SLOT_ITEM), buckets), rating, bias);
            }
        }
        for (int older = 0; older < User.OLDER; older++) {
            int bucket = Model.bucket(user.u4(User.rated(older)), buckets);
            if (bucket > 0) {
                known += rate(bucket, user.u1(User.rated(older) + 4), bias);
            }
        }
        if (known > 0) {
            solve();
        }
        double taste = 0;
        double strength = 0;
        double wanted = 0;
        for (int at = 0; at < count; at++) {
            double factor = factors[item * count + at];
            taste += person[at] * factor;
            strength += person[at] * person[at];
            wanted += factor * factor;
        }
        into[begin] = (float) taste;
        into[begin + 1] = known;
        into[begin + 2] = (float) strength;
        into[begin + 3] = (float) wanted;
    }

    /** Add one rated item to the normal equations; 0 where its factors are not known. */
    private int rate(int bucket, int rating, double bias) {
        double left = rating / (double) User.RATING_STEPS - (level + offsets[bucket] + bias);
        int some = 0;
        for (int at = 0; at < count; at++) {
            double factor = factors[bucket * count + at];
            some = factor != 0 ? 1 : some;
            person[at] += factor * left;
            for (int other = 0; other <= at; other++) {
                gram[at][other] += factor * factors[bucket * count + other];
            }
        }
        return some;
    }

    /** (gram + RIDGE I)^-1 person, in place, by Cholesky. */
    private void solve() {
        for (int at = 0; at < count; at++) {
            gram[at][at] += RIDGE;
            for (int other = 0; other <= at; other++) {
                double total = gram[at][other];
                for (int inner = 0; inner < other; inner++) {
                    total -= gram[at][inner] * gram[other][inner];
                }
                gram[at][other] = other == at ? Math.sqrt(total) : total / gram[other][other];
            }
            for (int inner = 0; inner < at; inner++) {
                person[at] -= gram[at][inner] * person[inner];
            }
            person[at] /= gram[at][at];
        }
        for (int at = count - 1; at >= 0; at--) {
            for (int inner = at + 1; inner < count; inner++) {
                person[at] -= gram[inner][at] * person[inner];
            }
            person[at] /= gram[at][at];
        }
    }
}
