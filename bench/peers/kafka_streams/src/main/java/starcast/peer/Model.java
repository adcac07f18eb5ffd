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
        private final LongBuffer vectors;
        private final float[] outputs;
        int count;

        private Batch(int most) {
            this.most = most;
            columns = new float[most * width];
            columnsBuffer = room(4 * columns.length).asFloatBuffer();
            vectors = room(8 * most).asLongBuffer();
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
        void add(Event event, Row user, int attributesRow) {
            int buckets = settings.buckets();
            int item = bucket(event.item & 0xFFFF_FFFFL, buckets);
            taste.fold(user, buckets, item, columns, begin(), settings.features());
            vectors.put(count, lookups.vectorOf(attributesRow));
            count++;
        }

        /** What the network says of all events: {@code OUTPUTS} numbers each. */
        float[] outputs() throws OrtException {
            columnsBuffer.put(0, columns, 0, count * width);
            try (OnnxTensor first = OnnxTensor.createTensor(
                            environment, columnsBuffer.slice(0, count * width), new long[] {count, width});
                    OnnxTensor second =
                            OnnxTensor.createTensor(environment, vectors.slice(0, count), new long[] {count, 1});
                    OrtSession.Result result = session.run(Map.of("columns", first, "vector", second))) {
                ((OnnxTensor) result.get(0)).getFloatBuffer().get(outputs, 0, count * OUTPUTS);
            }
            return outputs;
        }
    }

    private static ByteBuffer room(int bytes) {
        return ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder());
    }
}
