"""The processors that run on Kafka, and what they share."""
