package starcast.peer;

import ai.onnxruntime.OrtException;
import com.fasterxml.jackson.core.JsonFactory;
import com.fasterxml.jackson.core.JsonGenerator;
import com.fasterxml.jackson.core.StreamWriteFeature;
import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.time.Instant;
import java.time.ZoneOffset;
import java.time.format.DateTimeFormatter;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;

/** From a batch of one partition's events to prediction records, and to states that follow. */
final class Scorer {
    /** Where rows of users are kept by hash. */
    interface Users {
        byte[] get(long user);

        void put(long user, byte[] row);
    }

    /** An event's prediction record. */
    record Answer(Event event, byte[] value) {}

    private static final JsonFactory JSON =
            JsonFactory.builder().enable(StreamWriteFeature.USE_FAST_DOUBLE_WRITER).build();
    private static final DateTimeFormatter TIME =
            DateTimeFormatter.ofPattern("uuuu-MM-dd'T'HH:mm:ss.SSS'Z'").withZone(ZoneOffset.UTC);

    final Model.Batch batch;
    private final Model model;
    private final Features features;
    private final ByteArrayOutputStream bytes = new ByteArrayOutputStream(1024);

    Scorer(Model model, int most) {
        this.model = model;
        batch = model.batch(most);
        features = new Features(model.lookups);
    }

    /** Answers to events in their order; {@code partition} and users' rows are left as they follow. */
    List<Answer> score(List<Event> events, Row partition, Users users) throws OrtException, IOException {
        Map<Long, Row> states = new HashMap<>();
        long firstSeq = partition.i8(User.SEQ);
        batch.clear();
        for (Event event : events) {
            Row user = states.computeIfAbsent(event.user, hash -> read(hash, users));
            int attributes = model.lookups.itemAttributes.find(event.item);
            features.compute(event, user, partition, attributes, batch.columns, batch.begin());
            batch.add(event, user, attributes);
            boolean repeated = User.repeats(user, event);
            User.advance(user, event, repeated, features.usual, partition.i8(User.STEP));
            User.advancePartition(partition, event, repeated, features);
        }
        float[] outputs = batch.outputs();
        states.forEach((hash, row) -> users.put(hash, row.stored()));
        String now = TIME.format(Instant.now());
        List<Answer> answers = new ArrayList<>(events.size());
        for (int at = 0; at < events.size(); at++) {
            Prediction said = new Prediction(
                    outputs, at * Model.OUTPUTS, batch.columns, at * batch.width, model.settings);
            answers.add(new Answer(events.get(at), encode(events.get(at), said, now, firstSeq + at)));
        }
        return answers;
    }

    /** A user's row to change; where none is kept, the one that the store had. */
    private Row read(long user, Users users) {
        byte[] stored = users.get(user);
        return stored == null ? model.lookups.users.copy(user) : Row.of(stored, 0, stored.length, Row.USER);
    }

    private byte[] encode(Event event, Prediction said, String now, long seq) throws IOException {
        bytes.reset();
        try (JsonGenerator json = JSON.createGenerator(bytes)) {
            json.writeStartObject();
            json.writeStringField("event_id", event.eventId);
            json.writeStringField("user_id", event.userId);
            json.writeStringField("item_id", event.itemId);
            json.writeStringField("event_time", TIME.format(Instant.ofEpochMilli(event.time)));
            json.writeStringField("predicted_at", now);
            json.writeStringField("kind", "interaction");
            json.writeNumberField("rating", rounded(said.rating));
            json.writeArrayFieldStart("distribution");
            for (float share : said.distribution) {
                json.writeNumber(rounded(share));
            }
            json.writeEndArray();
            json.writeArrayFieldStart("interval");
            json.writeNumber(rounded(said.low));
            json.writeNumber(rounded(said.high));
            json.writeEndArray();
            json.writeStringField("tier", said.tier);
            json.writeStringField("model_version", model.settings.version());
            json.writeObjectFieldStart("source");
            json.writeStringField("topic", event.topic);
            json.writeNumberField("partition", event.partition);
            json.writeNumberField("offset", event.offset);
            json.writeEndObject();
            json.writeNumberField("seq", seq);
            json.writeEndObject();
        }
        return bytes.toByteArray();
    }

    private static double rounded(float value) {
        return Math.rint(value * 1e4) / 1e4;
    }
}
