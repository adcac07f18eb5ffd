package starcast.peer;

import static starcast.peer.Lookups.CATEGORY;
import static starcast.peer.User.ACTIONS;
import static starcast.peer.User.HISTOGRAM;
import static starcast.peer.User.RATING_STEPS;
import static starcast.peer.User.RECENT;
import static starcast.peer.User.SLOT_ACTIONS;
import static starcast.peer.User.SLOT_ITEM;
import static starcast.peer.User.SLOT_RATING;
import static starcast.peer.User.SLOT_SECOND;
import static starcast.peer.User.STARS;
import static starcast.peer.User.slot;

/** The features of model/features.py, in the order of its table. NaN: not known. */
final class Features {
    static final int COUNT = 85;
    static final int BIAS = 0;
    static final int USER_EVENTS = 10;
    static final int ITEM_EVENTS = 32;
    static final int ITEM_KNOWN = 43;
    static final int TEXT_KNOWN = 81;

    private static final double USER_DAMPING = 6;
    private static final double ITEM_DAMPING = 15;
    private static final double[] PRIOR_HISTOGRAM = {0.5, 0.5, 1.5, 3.5, 4};
    private static final double PRIOR_SUM = 40; // stars
    private static final double PRIOR_COUNT = 10;
    private static final double CROSS_DAMPING = 2;
    private static final double RATE_DAMPING = 5;
    private static final double PRICE_BAND = 0.35;
    private static final double MINUTE = 60_000;
    private static final double HOUR = 3_600_000;
    private static final double DAY = 24 * HOUR;

    private final Lookups lookups;
    private final int[] recents = new int[RECENT]; // attributes of recent items
    private final double[][] alike = new double[4][3]; // recent items, those rated, their stars
    private float[] columns;
    private int at;

    // Of the event computed last:
    double usual; // global mean + item bias, what states keep residuals from
    boolean first; // its user had rated nothing before

    Features(Lookups lookups) {
        this.lookups = lookups;
    }

    /** Write the columns of an event that meets these rows, from {@code begin} on. */
    void compute(Event event, Row user, Row partition, int attributesRow, float[] into, int begin) {
        columns = into;
        at = begin;
        Row item = lookups.items.row(lookups.items.find(event.item));
        Row attributes = lookups.itemAttributes.row(attributesRow);
        Row person = lookups.userAttributes.row(lookups.userAttributes.find(event.user));
        for (int recent = 0; recent < RECENT; recent++) {
            recents[recent] = lookups.itemAttributes.find(user.i8(slot(recent) + SLOT_ITEM));
        }

        float globalMean = (float)
                ((partition.f8(User.PARTITION_SUM) + PRIOR_SUM) / (partition.i8(User.PARTITION_COUNT) + PRIOR_COUNT));
        double mean = globalMean;
        long itemCount = item.i8(Lookups.ITEM_RATING_COUNT);
        double itemSum = item.f8(Lookups.ITEM_RATING_SUM);
        float itemBias = (float) ((itemSum - itemCount * mean) / (itemCount + ITEM_DAMPING));
        usual = mean + itemBias;
        long ratings = user.u4(User.RATING_COUNT);
        double bias = user.f8(User.RESIDUAL_SUM) / (ratings + USER_DAMPING);
        double own = mean + bias;

        first = ratings == 0;
        double late = Newcomers.level(partition) * USER_DAMPING / (ratings + USER_DAMPING);
        put(Math.min(Math.max(mean + itemBias + bias + late, 1), STARS));
        put(globalMean);
        put(bias);
        double sum = user.f8(User.RATING_SUM);
        put((sum + USER_DAMPING * mean) / (ratings + USER_DAMPING));
        put(deviation(sum, user.f8(User.RATING_SQUARE_SUM), ratings));
        put(ratio(user.u4(HISTOGRAM + 16), ratings));
        put(ratio(user.u4(HISTOGRAM) + user.u4(HISTOGRAM + 4), ratings));
        recentRatings(user);
        put(Math.log1p(ratings));
        counts(user, ACTIONS, false);
        long last = user.i8(User.LAST_TIME);
        put(elapsed(last, event.time, HOUR));
        put(elapsed(user.u4(User.FIRST_SECOND) * 1000, event.time, DAY));
        put(Math.log1p(user.u4(User.SESSIONS)));
        boolean same = last > 0 && (event.session == 0
                ? event.time - last <= User.SESSION_GAP
                : event.session == user.i8(User.SESSION));
        put(same ? Math.log1p(user.u4(User.SESSION_EVENTS)) : 0);
        put(same ? elapsed(user.u4(User.SESSION_SECOND) * 1000, event.time, MINUTE) : 0);
        double userPrice = ratio(user.f8(User.PRICE_LOG_SUM), user.u4(User.PRICE_COUNT));
        put(userPrice);
        put(ratio(user.f8(User.PAID_LOG_SUM), user.u4(User.PAID_COUNT)));
        long texts = user.u4(User.TEXT_COUNT);
        put(texts > 0 ? (user.f8(User.TEXT_SUM) + CROSS_DAMPING * mean) / (texts + CROSS_DAMPING) : Double.NaN);

        put(itemBias);
        put(deviation(itemSum, item.f8(Lookups.ITEM_SQUARE_SUM), itemCount));
        double total = partition.i8(User.PARTITION_COUNT) + PRIOR_COUNT;
        for (int star = 0; star < STARS; star++) {
            double share = (partition.i8(User.PARTITION_HISTOGRAM + 8 * star) + PRIOR_HISTOGRAM[star]) / total;
            put((item.i8(Lookups.ITEM_HISTOGRAM + 8 * star) + ITEM_DAMPING * share) / (itemCount + ITEM_DAMPING));
        }
        put(Math.log1p(itemCount));
        counts(item, Lookups.ITEM_ACTIONS, true);
        put(Math.log1p(item.i8(Lookups.ITEM_SESSIONS)));
        put(elapsed(first(attributes.i8(Lookups.FIRST_TIME), item.i8(Lookups.ITEM_FIRST_TIME)), event.time, DAY));
        put(elapsed(item.i8(Lookups.ITEM_LAST_TIME), event.time, HOUR));
        double listed = lookups.logPrice(attributesRow);
        double itemPrice = Double.isNaN(listed) ? ratio(item.f8(Lookups.ITEM_PRICE_SUM), item.i8(Lookups.ITEM_PRICE_COUNT)) : listed;
        put(itemPrice);
        put(attributes.f4(Lookups.PRICE_RANK));
        put(attributes.i8(Lookups.VERSION) > 0);

        for (int action = 0; action < Event.COUNTED; action++) {
            put(event.action == action);
        }
        rates(user, ACTIONS, false);
        rates(item, Lookups.ITEM_ACTIONS, true);
        double price = Math.log1p(event.price);
        put(price);
        put(price - itemPrice);
        put(Math.log1p(event.quantity));
        put(itemPrice - userPrice);
        double angle = Math.floorMod(event.time, (long) DAY) * (2 * Math.PI / DAY);
        put(Math.sin(angle));
        put(Math.cos(angle));

        compare(user, attributes, listed, own);
        met(event, user);
        put(person.f4(Lookups.AGE) / 100f);
        bits(person.u4(Lookups.GENDER), 2);
        bits(person.u4(Lookups.REGION), 3);
        texts(user, attributesRow, own);
    }

    /** Newest rating of recent items, and their mean. */
    private void recentRatings(Row user) {
        int newest = 0;
        int rated = 0;
        double stars = 0;
        for (int recent = 0; recent < RECENT; recent++) {
            int rating = user.u1(slot(recent) + SLOT_RATING);
            if (rating > 0) {
                newest = rated == 0 ? rating : newest;
                rated++;
                stars += rating / (double) RATING_STEPS;
            }
        }
        put(rated > 0 ? newest / (double) RATING_STEPS : Double.NaN);
        put(ratio(stars, rated));
    }

    private void counts(Row state, int begin, boolean wide) {
        long all = 0;
        for (int action = 0; action < Event.COUNTED; action++) {
            all += done(state, begin, wide, action);
        }
        put(Math.log1p(all));
        put(Math.log1p(done(state, begin, wide, Event.REVIEW)));
        put(Math.log1p(done(state, begin, wide, Event.VIEW) + done(state, begin, wide, Event.CLICK)));
        put(Math.log1p(done(state, begin, wide, Event.WISHLIST) + done(state, begin, wide, Event.SHARE)));
        put(Math.log1p(done(state, begin, wide, Event.CART)));
        put(Math.log1p(done(state, begin, wide, Event.PURCHASE)));
    }

    private void rates(Row state, int begin, boolean wide) {
        long views = done(state, begin, wide, Event.VIEW) + done(state, begin, wide, Event.CLICK);
        long carts = done(state, begin, wide, Event.CART);
        put(carts / (views + RATE_DAMPING));
        put(done(state, begin, wide, Event.PURCHASE) / (views + carts + RATE_DAMPING));
    }

    /** Recent items alike in widest category, narrowest category, brand and price band. */
    private void compare(Row user, Row mine, double price, double own) {
        int depth = 0;
        while (depth < Lookups.LEVELS - 1 && mine.u4(CATEGORY + 4 * (depth + 1)) != 0) {
            depth++;
        }
        for (double[] each : alike) {
            each[0] = each[1] = each[2] = 0;
        }
        for (int recent = 0; recent < RECENT; recent++) {
            Row theirs = lookups.itemAttributes.row(recents[recent]);
            int rating = user.u1(slot(recent) + SLOT_RATING);
            share(0, same(mine, theirs, CATEGORY), rating);
            share(1, same(mine, theirs, CATEGORY + 4 * depth), rating);
            share(2, same(mine, theirs, Lookups.BRAND), rating);
            share(3, Math.abs(lookups.logPrice(recents[recent]) - price) < PRICE_BAND, rating);
        }
        for (double[] each : alike) {
            put(each[0]);
            put((each[2] - each[1] * own) / (each[1] + CROSS_DAMPING));
        }
    }

    private void share(int what, boolean shared, int rating) {
        if (shared) {
            alike[what][0]++;
            if (rating > 0) {
                alike[what][1]++;
                alike[what][2] += rating / (double) RATING_STEPS;
            }
        }
    }

    /** What the user did with this very item lately. */
    private void met(Event event, Row user) {
        int actions = 0;
        int rating = 0;
        long second = 0;
        for (int recent = 0; recent < RECENT; recent++) {
            if (user.i8(slot(recent) + SLOT_ITEM) == event.item) {
                actions = user.u1(slot(recent) + SLOT_ACTIONS);
                rating = user.u1(slot(recent) + SLOT_RATING);
                second = user.u4(slot(recent) + SLOT_SECOND);
            }
        }
        put((actions & (1 << Event.VIEW | 1 << Event.CLICK)) != 0);
        put((actions & 1 << Event.CART) != 0);
        put((actions & 1 << Event.PURCHASE) != 0);
        put(rating > 0 ? rating / (double) RATING_STEPS : Double.NaN);
        put(elapsed(second * 1000, event.time, HOUR));
    }

    /** Cosines of the item's vector with those of recent items. */
    private void texts(Row user, int attributesRow, double own) {
        int mine = lookups.vectorOf(attributesRow);
        boolean known = mine < lookups.vectors.size;
        int count = 0;
        double total = 0;
        double highest = -1;
        double weights = 0;
        double deviation = 0;
        for (int recent = 0; known && recent < RECENT; recent++) {
            int theirs = lookups.vectorOf(recents[recent]);
            if (theirs == lookups.vectors.size) {
                continue;
            }
            double cosine = lookups.cosine(mine, theirs);
            int rating = user.u1(slot(recent) + SLOT_RATING);
            count++;
            total += cosine;
            highest = Math.max(highest, cosine);
            if (rating > 0 && cosine > 0) {
                weights += cosine;
                deviation += cosine * (rating / (double) RATING_STEPS - own);
            }
        }
        put(known);
        put(ratio(total, count));
        put(count > 0 ? highest : Double.NaN);
        put(count > 0 ? deviation / (weights + CROSS_DAMPING) : Double.NaN);
    }

    private void bits(long hash, int count) {
        for (int bit = 0; bit < count; bit++) {
            put(hash == 0 ? Double.NaN : hash >> bit & 1);
        }
    }

    private void put(double value) {
        columns[at++] = (float) value;
    }

    private void put(boolean value) {
        columns[at++] = value ? 1 : 0;
    }

    private static long done(Row state, int begin, boolean wide, int action) {
        return wide ? state.i8(begin + 8 * action) : state.u4(begin + 4 * action);
    }

    private static boolean same(Row mine, Row theirs, int field) {
        return mine.u4(field) != 0 && mine.u4(field) == theirs.u4(field);
    }

    private static long first(long heard, long met) {
        return heard > 0 && met > 0 ? Math.min(heard, met) : Math.max(heard, met);
    }

    private static double deviation(double sum, double squares, long count) {
        double mean = sum / count;
        return count > 1 ? Math.sqrt(Math.max(squares / count - mean * mean, 0)) : Double.NaN;
    }

    private static double ratio(double total, long count) {
        return count > 0 ? total / count : Double.NaN;
    }

    private static double elapsed(long since, long now, double unit) {
        return since > 0 ? Math.log1p(Math.max(now - since, 0) / unit) : Double.NaN;
    }
}
