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
    static final int COLUMNS = 6;

    private final int count; // of what is unknown of a user: the level, then factors
    private final Settings.Taste given;
    private final float[] factors; // of buckets
    private final float[] offsets;
    private final double[][] gram;
    private final double[] person;

    /** From a file of offsets and then factors by bucket. */
    Taste(Path file, int buckets, Settings.Taste given) throws IOException {
        FloatBuffer numbers =
                ByteBuffer.wrap(Files.readAllBytes(file)).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer();
        this.given = given;
        count = given.ridge().length;
        offsets = new float[buckets];
        factors = new float[buckets * (count - 1)];
        numbers.get(offsets).get(factors);
        gram = new double[count][count];
        person = new double[count];
    }

    private Taste(Taste other) {
        given = other.given;
        count = other.count;
        factors = other.factors;
        offsets = other.offsets;
        gram = new double[count][count];
        person = new double[count];
    }

    /** The same numbers for another thread. */
    Taste shared() {
        return new Taste(this);
    }

    /** Write the columns of an item (a bucket) for a user behind the {@code features} from {@code begin} on. */
    void fold(Row user, int buckets, int item, float[] into, int begin, int features) {
        for (int at = 0; at < count; at++) {
            person[at] = 0;
            Arrays.fill(gram[at], 0);
        }
        int age = 0;
        int known = 0;
        for (int recent = 0; recent < User.RECENT; recent++) {
            int slot = User.slot(recent);
            int rating = user.u1(slot + User.SLOT_RATING);
            if (rating > 0) {
                known += rate(Model.bucket(user.u4(slot + User.SLOT_ITEM), buckets), rating, age++);
            }
        }
        long left = user.u4(User.LEFT);
        for (int older = 0; older < Math.min(left, User.OLDER); older++) {
            int place = User.rated((int) ((left - 1 - older) % User.OLDER));
            int bucket = Model.bucket(user.u4(place), buckets);
            if (bucket > 0) {
                known += rate(bucket, user.u1(place + 4), age++);
            }
        }
        if (age > 0) {
            solve();
        }
        double taste = 0;
        double strength = 0;
        double wanted = 0;
        for (int at = 1; at < count; at++) {
            double factor = factors[item * (count - 1) + at - 1];
            taste += person[at] * factor;
            strength += person[at] * person[at];
            wanted += factor * factor;
        }
        double more = given.itemDamping() - given.damping();
        double ratings = Math.expm1(running(2, into, begin));
        int to = begin + features;
        into[to] = (float) (person[0] - running(0, into, begin));
        into[to + 1] = (float) (running(1, into, begin) * more / (ratings + given.damping()));
        into[to + 2] = (float) taste;
        into[to + 3] = known;
        into[to + 4] = (float) strength;
        into[to + 5] = (float) wanted;
    }

    /** One of the running features; 0 where it is not known. */
    private double running(int number, float[] features, int begin) {
        float value = features[begin + given.running()[number]];
        return Float.isNaN(value) ? 0 : value;
    }

    /** Add one rated item to the normal equations; 0 where its factors are not known. */
    private int rate(int bucket, int rating, int age) {
        double left = rating / (double) User.RATING_STEPS - (given.level() + offsets[bucket]);
        double weight = given.fade() / (given.fade() + age);
        int some = 0;
        for (int at = 0; at < count; at++) {
            double factor = weight * known(bucket, at);
            some = at > 0 && factor != 0 ? 1 : some;
            person[at] += factor * left;
            for (int other = 0; other <= at; other++) {
                gram[at][other] += factor * known(bucket, other);
            }
        }
        return some;
    }

    private double known(int bucket, int at) {
        return at == 0 ? 1 : factors[bucket * (count - 1) + at - 1];
    }

    /** (gram + diag(ridge))^-1 person, in place, by Cholesky. */
    private void solve() {
        for (int at = 0; at < count; at++) {
            gram[at][at] += given.ridge()[at];
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
