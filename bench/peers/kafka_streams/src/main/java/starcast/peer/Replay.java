package starcast.peer;

import java.io.BufferedWriter;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.channels.FileChannel;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;

/** The same scoring without Kafka: what tests compare with model.replay and model.predict. */
public final class Replay {
    private Replay() {}

    /**
     * Score the lines of {@code events} in a folder (topic, offset and value, by tabs) as one
     * partition; leave {@code columns} (floats, little endian) and {@code predictions}, a line each.
     */
    public static void main(String[] arguments) throws Exception {
        Path folder = Path.of(arguments[0]);
        Settings settings = Settings.read(folder);
        try (Model model = new Model(settings, folder);
                FileChannel columns = FileChannel.open(
                        folder.resolve("columns"), StandardOpenOption.CREATE, StandardOpenOption.WRITE);
                BufferedWriter predictions = Files.newBufferedWriter(folder.resolve("predictions"))) {
            Scorer scorer = new Scorer(model, settings.batch());
            Row partition = model.lookups.partitions.copy(0);
            Map<Long, byte[]> rows = new HashMap<>();
            Scorer.Users users = new Scorer.Users() {
                @Override
                public byte[] get(long user) {
                    return rows.get(user);
                }

                @Override
                public void put(long user, byte[] row) {
                    rows.put(user, row);
                }
            };
            List<String> lines = Files.readAllLines(folder.resolve("events"));
            for (int begin = 0; begin < lines.size(); begin += settings.batch()) {
                List<Event> events = new ArrayList<>();
                for (String line : lines.subList(begin, Math.min(begin + settings.batch(), lines.size()))) {
                    events.add(event(line));
                }
                for (Scorer.Answer answer : scorer.score(events, partition, users)) {
                    predictions.write(new String(answer.value(), StandardCharsets.UTF_8) + "\n");
                }
                int count = events.size() * scorer.batch.width;
                ByteBuffer bytes = ByteBuffer.allocate(4 * count).order(ByteOrder.LITTLE_ENDIAN);
                bytes.asFloatBuffer().put(scorer.batch.columns, 0, count);
                columns.write(bytes);
            }
        }
    }

    private static Event event(String line) throws IOException {
        String[] parts = line.split("\t", 3);
        return new Event(parts[0], 0, Long.parseLong(parts[1]), parts[2].getBytes(StandardCharsets.UTF_8));
    }
}
