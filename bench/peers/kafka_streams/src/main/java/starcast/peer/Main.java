package starcast.peer;

import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.PropertyNamingStrategies;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.Map;
import java.util.Optional;
import java.util.Properties;
import java.util.concurrent.atomic.AtomicReference;
import org.apache.kafka.common.serialization.Serde;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.Topology;
import org.apache.kafka.streams.errors.StreamsUncaughtExceptionHandler.StreamThreadExceptionResponse;
import org.apache.kafka.streams.state.KeyValueBytesStoreSupplier;
import org.apache.kafka.streams.state.StoreBuilder;
import org.apache.kafka.streams.state.Stores;

/** Scores the events that wait in its topics, and prints how fast, as JSON. */
public final class Main {
    private static final Duration WAIT = Duration.ofSeconds(60); // a broker that answers nothing ends the run
    private static final long LOOK_MS = 20;

    private Main() {}

    /** In a folder that bench/peers/kafka_streams.py has filled. */
    public static void main(String[] arguments) throws Exception {
        Path folder = Path.of(arguments[0]);
        Settings settings = Settings.read(folder);
        Pace pace = new Pace(settings.warmUp(), settings.batch());
        AtomicReference<Throwable> failure = new AtomicReference<>();
        try (Model model = new Model(settings, folder);
                KafkaStreams streams = new KafkaStreams(topology(model, pace), properties(settings, folder))) {
            streams.setUncaughtExceptionHandler(error -> {
                failure.set(error);
                return StreamThreadExceptionResponse.SHUTDOWN_CLIENT;
            });
            streams.start();
            waitFor(settings.events(), pace, failure);
            if (!streams.close(WAIT)) {
                throw new IOException("Kafka Streams did not stop within " + WAIT.toSeconds() + " s");
            }
        }
        System.out.println(new ObjectMapper()
                .setPropertyNamingStrategy(PropertyNamingStrategies.SNAKE_CASE)
                .writeValueAsString(Map.of(
                        "marks", pace.marks, "events", pace.ended(), "calls", pace.calls(), "memory_mb", memory())));
    }

    private static void waitFor(long events, Pace pace, AtomicReference<Throwable> failure) throws Exception {
        Optional<ProcessHandle> parent = ProcessHandle.current().parent();
        long seen = 0;
        long since = System.nanoTime();
        while (pace.ended() < events) {
            Thread.sleep(LOOK_MS);
            if (failure.get() != null) {
                throw new IOException("Kafka Streams failed", failure.get());
            }
            if (!parent.map(ProcessHandle::isAlive).orElse(true)) {
                throw new IOException("What has started this program is gone");
            }
            if (pace.ended() > seen) {
                seen = pace.ended();
                since = System.nanoTime();
            } else if (System.nanoTime() - since > WAIT.toNanos()) {
                throw new IOException("Kafka gave nothing for " + WAIT.toSeconds() + " s, after " + seen + " events");
            }
        }
    }

    private static Topology topology(Model model, Pace pace) {
        Settings settings = model.settings;
        Topology topology = new Topology();
        topology.addSource("events", settings.inputs().toArray(String[]::new));
        topology.addProcessor("score", () -> new Scoring(model, pace), "events");
        topology.addStateStore(store(Stores.persistentKeyValueStore(Scoring.USERS), Serdes.Long()), "score");
        topology.addStateStore(store(Stores.persistentKeyValueStore(Scoring.PARTITIONS), Serdes.Integer()), "score");
        topology.addStateStore(store(Stores.inMemoryKeyValueStore(Scoring.WAITING), Serdes.Integer()), "score");
        topology.addSink("predictions", settings.output(), "score");
        return topology;
    }

    /** A store with a changelog (the default) whose writes are gathered until a commit. */
    private static <K> StoreBuilder<?> store(KeyValueBytesStoreSupplier supplier, Serde<K> key) {
        return Stores.keyValueStoreBuilder(supplier, key, Serdes.ByteArray()).withCachingEnabled();
    }

    private static Properties properties(Settings settings, Path folder) {
        Properties properties = new Properties();
        properties.putAll(Map.of(
                StreamsConfig.APPLICATION_ID_CONFIG, settings.application(),
                StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, settings.bootstrap(),
                StreamsConfig.PROCESSING_GUARANTEE_CONFIG, StreamsConfig.EXACTLY_ONCE_V2,
                StreamsConfig.STATE_DIR_CONFIG, folder.resolve("state").toString(),
                StreamsConfig.DEFAULT_KEY_SERDE_CLASS_CONFIG, Serdes.ByteArraySerde.class,
                StreamsConfig.DEFAULT_VALUE_SERDE_CLASS_CONFIG, Serdes.ByteArraySerde.class));
        properties.putAll(settings.streams());
        return properties;
    }

    /** Resident, as the system has it. */
    private static long memory() throws IOException {
        for (String line : Files.readAllLines(Path.of("/proc/self/status"))) {
            if (line.startsWith("VmRSS:")) {
                return Long.parseLong(line.replaceAll("\\D", "")) / 1024;
            }
        }
        return 0;
    }
}
