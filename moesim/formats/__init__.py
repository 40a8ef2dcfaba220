"""Files that others write: measured records, logs of benchmarks, traces of profilers; read into types of study."""
