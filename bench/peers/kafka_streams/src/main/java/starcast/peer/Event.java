package starcast.peer;

import com.fasterxml.jackson.core.JsonFactory;
import com.fasterxml.jackson.core.JsonParser;
import com.fasterxml.jackson.core.JsonToken;
import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.time.OffsetDateTime;
import java.util.List;
import net.openhft.hashing.LongHashFunction;
import org.apache.kafka.common.utils.Utils;

/** A review or an action, as model/events.py has it: ids as hashes, absent numbers as NaN. */
final class Event {
    static final int REVIEW = 0;
    static final int VIEW = 1;
    static final int CLICK = 2;
    static final int WISHLIST = 3;
    static final int SHARE = 4;
    static final int CART = 5;
    static final int PURCHASE = 7;
    static final int COUNTED = 8; // actions that states count
    private static final List<String> ACTIONS =
            List.of("review", "view", "click", "wishlist", "share", "cart", "remove_from_cart", "purchase");

    private static final JsonFactory JSON = new JsonFactory();
    private static final LongHashFunction XX = LongHashFunction.xx3();
    private static final long LOW = 0x7FFF_FFFFL;
    private static final int LONGEST_ID = 256;

    final String topic; // without the prefix
    final int partition;
    final long offset;
    String eventId;
    String userId;
    String itemId;
    long time; // ms
    float rating = Float.NaN;
    float price = Float.NaN;
    float quantity = Float.NaN;
    int action = REVIEW;
    long id;
    long user;
    long item;
    long session;

    /** Decode a JSON value; unknown fields are left out, a bad one throws. */
    Event(String topic, int partition, long offset, byte[] value) throws IOException {
        this.topic = topic;
        this.partition = partition;
        this.offset = offset;
        boolean review = topic.equals("reviews");
        String named = null;
        OffsetDateTime at = null;
        String sessionId = null;
        try (JsonParser parser = JSON.createParser(value)) {
            expect(parser.nextToken() == JsonToken.START_OBJECT, "an object");
            while (parser.nextToken() == JsonToken.FIELD_NAME) {
                String field = parser.currentName();
                if (parser.nextToken() == JsonToken.VALUE_NULL) {
                    continue;
                }
                switch (field) {
                    case "event_id" -> eventId = identifier(parser);
                    case "user_id" -> userId = identifier(parser);
                    case "item_id" -> itemId = identifier(parser);
                    case "event_time" -> at = OffsetDateTime.parse(parser.getText());
                    case "rating" -> rating = review ? number(parser, 1, 5) : rating;
                    case "price" -> price = review ? price : number(parser, 0, 1e9);
                    case "quantity" -> quantity = review ? quantity : number(parser, Double.MIN_VALUE, 1e6);
                    case "action" -> named = review ? null : parser.getText();
                    case "session_id" -> sessionId = review ? null : identifier(parser);
                    default -> parser.skipChildren();
                }
            }
        }
        expect(eventId != null && userId != null && itemId != null && at != null, "ids and a time");
        time = at.toInstant().toEpochMilli();
        if (!review) {
            action = ACTIONS.indexOf(named);
            expect(action > REVIEW, "an action");
        }
        id = hash(eventId);
        user = hash(userId);
        item = hash(itemId);
        session = hash(sessionId);
    }

    /** Stars rounded to 1/32; 0: none. */
    double stars() {
        return action != REVIEW || Float.isNaN(rating) ? 0 : User.rounded(rating, User.RATING_STEPS);
    }

    /** As model/ids.py: the high bits from XXH3, the low ones from the hash of Kafka's partitioner. */
    static long hash(String id) {
        if (id == null || id.isEmpty()) {
            return 0;
        }
        byte[] key = id.getBytes(StandardCharsets.UTF_8);
        long hash = XX.hashBytes(key) & ~LOW | Utils.murmur2(key) & LOW;
        return hash == 0 ? ~LOW : hash;
    }

    private static String identifier(JsonParser parser) throws IOException {
        expect(parser.currentToken() == JsonToken.VALUE_STRING, "a string");
        String text = parser.getText();
        expect(!text.isEmpty() && text.codePointCount(0, text.length()) <= LONGEST_ID, "an id");
        return text;
    }

    private static float number(JsonParser parser, double lowest, double highest) throws IOException {
        double value = parser.getDoubleValue();
        expect(value >= lowest && value <= highest, "a number from " + lowest + " to " + highest);
        return (float) value;
    }

    private static void expect(boolean good, String what) throws IOException {
        if (!good) {
            throw new IOException(what + " was expected");
        }
    }
}
