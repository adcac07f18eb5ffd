package starcast.peer;

import ai.onnxruntime.OnnxTensor;
import ai.onnxruntime.OrtEnvironment;
import ai.onnxruntime.OrtException;
import ai.onnxruntime.OrtSession;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.FloatBuffer;
import java.nio.LongBuffer;
import java.nio.file.Path;
import java.util.Map;

/** The network, trees and calibration of a bundle: the first two by ONNX Runtime. */
final class Model implements AutoCloseable {
    static final int IDS = 2 + Lookups.LEVELS + 1 + User.RECENT + 1 + User.RECENT;
    static final int FEEDBACK = User.RECENT * 10; // rating, whether there is one, bits of actions
    static final int OUTPUTS = 6; // mean and five logits

    final Settings settings;
    final Lookups lookups;
    private final Taste taste;
    private final OrtEnvironment environment = OrtEnvironment.getEnvironment();
    private final OrtSession session;

    Model(Settings settings, Path folder) throws IOException, OrtException {
        this.settings = settings;
        if (settings.features() != Features.COUNT) {
            throw new IOException(settings.features() + " features are wanted, " + Features.COUNT + " computed");
        }
        lookups = new Lookups(folder, settings.vector());
        taste = new Taste(folder.resolve("taste"), settings.buckets(), settings.taste());
        try (OrtSession.SessionOptions options = new OrtSession.SessionOptions()) {
            options.setIntraOpNumThreads(1);
            options.setInterOpNumThreads(1);
            session = environment.createSession(folder.resolve("network.onnx").toString(), options);
        }
    }

    /** Bucket of an unsigned 32-bit hash. */
    static int bucket(long hash, int buckets) {
        return hash == 0 ? 0 : (int) (hash % (buckets - 1)) + 1;
    }

    Batch batch(int most) {
        return new Batch(most);
    }

    @Override
    public void close() throws OrtException {
        session.close();
    }

    /** What the network reads of some events, and what it says. One thread at a time. */
    final class Batch {
        final int width = settings.features() + Taste.COLUMNS;
        final float[] columns;
        private final int most;
        private final Taste taste = Model.this.taste.shared();
        private final FloatBuffer columnsBuffer;
        private final FloatBuffer feedback;
        private final LongBuffer ids;
        private final float[] outputs;
        int count;

        private Batch(int most) {
            this.most = most;
            columns = new float[most * width];
            columnsBuffer = room(4 * columns.length).asFloatBuffer();
            feedback = room(4 * most * FEEDBACK).asFloatBuffer();
            ids = room(8 * most * IDS).asLongBuffer();
            outputs = new float[most * OUTPUTS];
        }

        void clear() {
            count = 0;
        }

        boolean full() {
            return count == most;
        }

        /** Where the columns of the next event begin. */
        int begin() {
            return count * width;
        }

        /** Take the next event in, whose features stand in {@code columns} already. */
        void add(Event event, Row user, int attributesRow, Features features) {
            Row attributes = lookups.itemAttributes.row(attributesRow);
            int buckets = settings.buckets();
            int item = bucket(event.item & 0xFFFF_FFFFL, buckets);
            taste.fold(user, buckets, item, columns, begin(), settings.features());
            int at = count * IDS;
            ids.put(at++, event.user == 0 ? 0 : Long.remainderUnsigned(event.user, buckets - 1) + 1);
            ids.put(at++, item);
            for (int level = 0; level < Lookups.LEVELS; level++) {
                ids.put(at++, bucket(attributes.u4(Lookups.CATEGORY + 4 * level), settings.nameBuckets()));
            }
            ids.put(at++, bucket(attributes.u4(Lookups.BRAND), settings.nameBuckets()));
            ids.put(at + User.RECENT, lookups.vectorOf(attributesRow));
            for (int recent = 0; recent < User.RECENT; recent++) {
                int slot = User.slot(recent);
                ids.put(at + recent, bucket(user.u4(slot + User.SLOT_ITEM), buckets));
                ids.put(at + User.RECENT + 1 + recent, lookups.vectorOf(features.recents()[recent]));
                int rating = user.u1(slot + User.SLOT_RATING);
                int actions = user.u1(slot + User.SLOT_ACTIONS);
                int to = count * FEEDBACK + recent * 10;
                feedback.put(to, rating > 0 ? (rating / (float) User.RATING_STEPS - 3) / 2 : 0);
                feedback.put(to + 1, rating > 0 ? 1 : 0);
                for (int bit = 0; bit < 8; bit++) {
                    feedback.put(to + 2 + bit, actions >> 7 - bit & 1);
                }
            }
            count++;
        }

        /** What the network says of all events: {@code OUTPUTS} numbers each. */
        float[] outputs() throws OrtException {
            columnsBuffer.put(0, columns, 0, count * width);
            try (OnnxTensor first = tensor(columnsBuffer, width);
                    OnnxTensor second =
                            OnnxTensor.createTensor(environment, ids.slice(0, count * IDS), new long[] {count, IDS});
                    OnnxTensor third = tensor(feedback, FEEDBACK);
                    OrtSession.Result result =
                            session.run(Map.of("columns", first, "ids", second, "feedback", third))) {
                ((OnnxTensor) result.get(0)).getFloatBuffer().get(outputs, 0, count * OUTPUTS);
            }
            return outputs;
        }

        private OnnxTensor tensor(FloatBuffer buffer, int columns) throws OrtException {
            return OnnxTensor.createTensor(
                    environment, buffer.slice(0, count * columns), new long[] {count, columns});
        }
    }

    private static ByteBuffer room(int bytes) {
        return ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder());
    }
}
