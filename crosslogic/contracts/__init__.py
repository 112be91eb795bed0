"""What crosses Temporal: inputs, results, ids, type names and task queues."""
