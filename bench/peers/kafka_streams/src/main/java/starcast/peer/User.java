package starcast.peer;

/** What model/state.py does with a user's row and with a partition's, one event at a time. */
final class User {
    static final int RECENT = 16;
    static final int OLDER = 64;
    static final int STARS = 5;
    static final int RATING_STEPS = 32;
    static final int LOG_STEPS = 256;
    static final int RESIDUAL_STEPS = 1024;
    static final long SESSION_GAP = 30 * 60 * 1000;

    // Where a USER row has what.
    static final int STEP = 0;
    static final int LAST_TIME = 8;
    static final int FIRST_SECOND = 16;
    static final int SESSION_SECOND = 20;
    static final int SESSION = 24;
    static final int RATING_SUM = 32;
    static final int RATING_SQUARE_SUM = 40;
    static final int RESIDUAL_SUM = 48;
    static final int PRICE_LOG_SUM = 56;
    static final int PAID_LOG_SUM = 64;
    static final int TEXT_SUM = 72;
    static final int SESSION_EVENTS = 80;
    static final int SESSIONS = 84;
    static final int ACTIONS = 88;
    static final int RATING_COUNT = 120;
    static final int HISTOGRAM = 124;
    static final int PRICE_COUNT = 144;
    static final int PAID_COUNT = 148;
    static final int TEXT_COUNT = 152;
    static final int LEFT = 156;
    static final int SLOTS = 160;
    static final int SLOT = 22; // event id, item, second, rating, actions
    static final int SLOT_ITEM = 8;
    static final int SLOT_SECOND = 16;
    static final int SLOT_RATING = 20;
    static final int SLOT_ACTIONS = 21;
    static final int RATED = SLOTS + RECENT * SLOT;
    static final int RATED_SIZE = 5; // low half of the item's hash, rating

    // And a PARTITION row.
    static final int SEQ = 8;
    static final int PARTITION_COUNT = 16;
    static final int PARTITION_SUM = 24;
    static final int PARTITION_HISTOGRAM = 32;

    private User() {}

    static int slot(int number) {
        return SLOTS + number * SLOT;
    }

    static int rated(int number) {
        return RATED + number * RATED_SIZE;
    }

    /** Whether an event repeats one of the last 16 of its user. */
    static boolean repeats(Row user, Event event) {
        for (int at = 0; at < RECENT; at++) {
            if (user.i8(slot(at)) == event.id) {
                return true;
            }
        }
        return false;
    }

    /** Apply an event to its user's row; {@code usual} is the mean and the item's bias as it met them. */
    static void advance(Row user, Event event, boolean repeated, double usual, long step) {
        user.i8(STEP, step + 1);
        if (repeated) {
            return;
        }
        for (int at = RECENT - 1; at > 0; at--) {
            user.i8(slot(at), user.i8(slot(at - 1)));
        }
        user.i8(slot(0), event.id);
        long second = event.time / 1000;
        sit(user, event, second);
        user.i8(LAST_TIME, Math.max(user.i8(LAST_TIME), event.time));
        double stars = event.stars();
        double old = touch(user, event, second, stars);
        if (stars > 0) {
            user.add8(RESIDUAL_SUM, old > 0 ? stars - old : rounded(stars - usual, RESIDUAL_STEPS));
        }
        count(user, event, stars, stars > 0 ? old : 0);
    }

    /** Apply an event, whose features were computed last, to its partition's row. */
    static void advancePartition(Row partition, Event event, boolean repeated, Features met) {
        partition.count8(STEP, 1);
        partition.count8(SEQ, 1);
        double stars = event.stars();
        if (stars > 0 && !repeated) {
            partition.count8(PARTITION_COUNT, 1);
            partition.add8(PARTITION_SUM, stars);
            partition.count8(PARTITION_HISTOGRAM + 8 * (star(stars) - 1), 1);
            if (met.first) {
                Newcomers.learn(partition, stars - met.usual);
            }
        }
    }

    static double rounded(double value, int steps) {
        return Math.rint(value * steps) / steps;
    }

    private static void sit(Row user, Event event, long second) {
        long last = user.i8(LAST_TIME);
        boolean opened = event.session != 0
                ? event.session != user.i8(SESSION)
                : last == 0 || event.time - last > SESSION_GAP;
        if (opened) {
            user.u4(SESSION_SECOND, second);
            user.u4(SESSION_EVENTS, 0);
            user.count4(SESSIONS, 1);
        }
        user.count4(SESSION_EVENTS, 1);
        if (event.session != 0) {
            user.i8(SESSION, event.session);
        }
        if (user.u4(FIRST_SECOND) == 0) {
            user.u4(FIRST_SECOND, second);
        }
    }

    /** Bring the item to the front of the recent ones; gives the stars that it had, 0: none. */
    private static double touch(Row user, Event event, long second, double stars) {
        int place = 0;
        while (place < RECENT && user.i8(slot(place) + SLOT_ITEM) != event.item) {
            place++;
        }
        int rating = 0;
        int actions = 0;
        if (place < RECENT) {
            second = Math.max(second, user.u4(slot(place) + SLOT_SECOND));
            rating = user.u1(slot(place) + SLOT_RATING);
            actions = user.u1(slot(place) + SLOT_ACTIONS);
        } else {
            place = RECENT - 1;
            leave(user);
        }
        for (int at = place; at > 0; at--) {
            user.i8(slot(at) + SLOT_ITEM, user.i8(slot(at - 1) + SLOT_ITEM));
            user.u4(slot(at) + SLOT_SECOND, user.u4(slot(at - 1) + SLOT_SECOND));
            user.u1(slot(at) + SLOT_RATING, user.u1(slot(at - 1) + SLOT_RATING));
            user.u1(slot(at) + SLOT_ACTIONS, user.u1(slot(at - 1) + SLOT_ACTIONS));
        }
        user.i8(slot(0) + SLOT_ITEM, event.item);
        user.u4(slot(0) + SLOT_SECOND, second);
        user.u1(slot(0) + SLOT_RATING, stars > 0 ? (int) (stars * RATING_STEPS) : rating);
        user.u1(slot(0) + SLOT_ACTIONS, actions | 1 << event.action);
        return rating / (double) RATING_STEPS;
    }

    /** Keep the rating of the recent item that is about to be forgotten. */
    private static void leave(Row user) {
        int last = slot(RECENT - 1);
        int rating = user.u1(last + SLOT_RATING);
        if (rating > 0) {
            int place = rated((int) (user.u4(LEFT) % OLDER));
            user.u4(place, user.i8(last + SLOT_ITEM));
            user.u1(place + 4, rating);
            user.count4(LEFT, 1);
        }
    }

    private static void count(Row user, Event event, double stars, double replaced) {
        if (replaced > 0) {
            user.count4(HISTOGRAM + 4 * (star(replaced) - 1), -1);
            user.add8(RATING_SUM, -replaced);
            user.add8(RATING_SQUARE_SUM, -replaced * replaced);
        } else {
            user.count4(ACTIONS + 4 * event.action, 1);
            user.count4(RATING_COUNT, stars > 0 ? 1 : 0);
        }
        if (stars > 0) {
            user.count4(HISTOGRAM + 4 * (star(stars) - 1), 1);
            user.add8(RATING_SUM, stars);
            user.add8(RATING_SQUARE_SUM, stars * stars);
        }
        if (!Float.isNaN(event.price)) {
            double price = rounded(Math.log1p(event.price), LOG_STEPS);
            user.count4(PRICE_COUNT, 1);
            user.add8(PRICE_LOG_SUM, price);
            if (event.action == Event.PURCHASE) {
                user.count4(PAID_COUNT, 1);
                user.add8(PAID_LOG_SUM, price);
            }
        }
    }

    /** Stars as a whole number, halves up; ratings lie within 1 to 5. */
    private static int star(double stars) {
        return (int) Math.floor(stars + 0.5);
    }
}
