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
    static final int COLUMNS = 8;

    private static final int LATELY = 2; // of what is unknown of a user: the level and the mood

    private final int count; // of what is unknown of a user: level and mood, then factors
    private final Settings.Taste given;
    private final float[] factors; // of buckets
    private final float[] offsets;
    private final float[] corrections;
    private final float[] ratings; // that offsets were fitted to
    private final double[][] gram;
    private final double[] person;

    /** From a file of offsets, corrections, ratings and then factors by bucket. */
    Taste(Path file, int buckets, Settings.Taste given) throws IOException {
        FloatBuffer numbers =
                ByteBuffer.wrap(Files.readAllBytes(file)).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer();
        this.given = given;
        count = given.ridge().length;
        offsets = new float[buckets];
        corrections = new float[buckets];
        ratings = new float[buckets];
        factors = new float[buckets * (count - LATELY)];
        numbers.get(offsets).get(corrections).get(ratings).get(factors);
        gram = new double[count][count];
        person = new double[count];
    }

    private Taste(Taste other) {
        given = other.given;
        count = other.count;
        factors = other.factors;
        offsets = other.offsets;
        corrections = other.corrections;
        ratings = other.ratings;
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
        for (int at = LATELY; at < count; at++) {
            double factor = known(item, at, 0);
            taste += person[at] * factor;
            strength += person[at] * person[at];
            wanted += factor * factor;
        }
        double more = given.itemDamping() - given.damping();
        double level = person[0] + person[1] - running(1, into, begin);
        double rated = Math.expm1(running(3, into, begin));
        double same = (ratings[item] + given.damping()) / (Math.max(rated, ratings[item]) + given.damping());
        double itemLevel = running(2, into, begin) * more / (rated + given.damping()) + corrections[item] * same;
        double[] trust = given.trust();
        double bias = running(0, into, begin) + trust[0] * level + trust[1] * itemLevel + trust[2] * taste;
        int to = begin + features;
        into[to] = (float) Math.max(Math.min(bias, 5), 1);
        into[to + 1] = (float) level;
        into[to + 2] = (float) person[1];
        into[to + 3] = (float) itemLevel;
        into[to + 4] = (float) taste;
        into[to + 5] = known;
        into[to + 6] = (float) strength;
        into[to + 7] = (float) wanted;
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
        double mood = Math.exp(-(1 + age) / given.mood());
        int some = 0;
        for (int at = 0; at < count; at++) {
            double factor = weight * known(bucket, at, mood);
            some = at >= LATELY && factor != 0 ? 1 : some;
            person[at] += factor * left;
            for (int other = 0; other <= at; other++) {
                gram[at][other] += factor * known(bucket, other, mood);
            }
        }
        return some;
    }

    private double known(int bucket, int at, double mood) {
        if (at < LATELY) {
            return at == 0 ? 1 : mood;
        }
        return factors[bucket * (count - LATELY) + at - LATELY];
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
