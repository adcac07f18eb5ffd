package starcast.peer;

import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.PropertyNamingStrategies;
import java.io.IOException;
import java.nio.file.Path;
import java.util.List;
import java.util.Map;

/** What bench/peers/kafka_streams.py says in settings.json; files lie in the same folder. */
record Settings(
        String bootstrap,
        String prefix, // of topics
        List<String> inputs, // topics with the prefix
        String output,
        String application,
        long events, // that will be found
        long warmUp, // of these not measured
        int batch, // most events in a call of the network, over all partitions
        int partitions,
        long gatherMs, // the longest wait of an event for a fuller call
        String version, // of the model
        int features,
        int buckets,
        int vector,
        Taste taste,
        double intercept,
        double slope,
        double temperature,
        double interval,
        Map<String, Object> streams) { // configuration of Kafka Streams

    /** The numbers of model/taste.py that are not by item. */
    record Taste(
            double level,
            double[] ridge,
            double damping,
            double itemDamping, // of the features
            double fade,
            double mood,
            double[] trust,
            int[] running) {} // columns of features

    static Settings read(Path folder) throws IOException {
        return new ObjectMapper()
                .setPropertyNamingStrategy(PropertyNamingStrategies.SNAKE_CASE)
                .readValue(folder.resolve("settings.json").toFile(), Settings.class);
    }
}
