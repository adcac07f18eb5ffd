package starcast.peer;

import java.io.IOException;
import java.nio.file.Path;

/**
 * What is read beside the states kept here, as the store had it when the program began: items'
 * states, attributes and vectors, and the rows that users and partitions begin with.
 */
final class Lookups {
    static final int ITEM = 176;
    static final int ITEM_ATTRIBUTES = 52;
    static final int USER_ATTRIBUTES = 20;

    // Where an ITEM row has what.
    static final int ITEM_FIRST_TIME = 8;
    static final int ITEM_LAST_TIME = 16;
    static final int ITEM_ACTIONS = 24;
    static final int ITEM_RATING_COUNT = 88;
    static final int ITEM_HISTOGRAM = 96;
    static final int ITEM_RATING_SUM = 136;
    static final int ITEM_SQUARE_SUM = 144;
    static final int ITEM_PRICE_COUNT = 152;
    static final int ITEM_PRICE_SUM = 160;
    static final int ITEM_SESSIONS = 168;

    // An ITEM_ATTRIBUTES row,
    static final int VERSION = 0;
    static final int FIRST_TIME = 8;
    static final int TEXT = 16;
    static final int BRAND = 24;
    static final int CATEGORY = 28;
    static final int LEVELS = 4; // of the path
    static final int PRICE = 44;
    static final int PRICE_RANK = 48;

    // and a USER_ATTRIBUTES row.
    static final int GENDER = 8;
    static final int REGION = 12;
    static final int AGE = 16;

    private static final int LANES = 16; // sums side by side, in the order that model/replay.py has

    final Table items;
    final Table itemAttributes;
    final Table userAttributes;
    final Table vectors;
    final Table users;
    final Table partitions; // by number
    private final int width;
    private final float[] numbers; // of all vectors, one after another
    private final int[] vectorOf; // of a row of item attributes
    private final double[] logPrices; // likewise

    Lookups(Path folder, int width) throws IOException {
        this.width = width;
        items = new Table(folder.resolve("items"), ITEM);
        itemAttributes = new Table(folder.resolve("item-attributes"), ITEM_ATTRIBUTES);
        userAttributes = new Table(folder.resolve("user-attributes"), USER_ATTRIBUTES);
        vectors = new Table(folder.resolve("vectors"), 4 * width);
        users = new Table(folder.resolve("users"), Row.USER);
        partitions = new Table(folder.resolve("partitions"), Row.PARTITION);
        numbers = new float[(vectors.size + 1) * width];
        for (int at = 0; at < numbers.length; at++) {
            numbers[at] = vectors.row(at / width).f4(4 * (at % width));
        }
        vectorOf = new int[itemAttributes.size + 1];
        logPrices = new double[itemAttributes.size + 1];
        for (int row = 0; row < vectorOf.length; row++) {
            vectorOf[row] = vectors.find(itemAttributes.row(row).i8(TEXT));
            logPrices[row] = Math.log1p(itemAttributes.row(row).f4(PRICE));
        }
    }

    /** The vector of the text in a row of item attributes; {@code vectors.size}: none. */
    int vectorOf(int attributesRow) {
        return vectorOf[attributesRow];
    }

    double logPrice(int attributesRow) {
        return logPrices[attributesRow];
    }

    float cosine(int one, int other) {
        float[] lanes = new float[LANES];
        int whole = width - width % LANES;
        for (int begin = 0; begin < whole; begin += LANES) {
            for (int lane = 0; lane < LANES; lane++) {
                lanes[lane] += numbers[one * width + begin + lane] * numbers[other * width + begin + lane];
            }
        }
        float total = 0;
        for (float lane : lanes) {
            total += lane;
        }
        for (int at = whole; at < width; at++) {
            total += numbers[one * width + at] * numbers[other * width + at];
        }
        return total;
    }
}
