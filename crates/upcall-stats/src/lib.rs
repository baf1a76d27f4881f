//! The page of counters and latency histograms that a worker keeps and anyone may watch
