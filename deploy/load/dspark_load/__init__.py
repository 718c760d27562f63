"""Load tests of a served ``dspark`` model by perf_analyzer, and the report of what they measured."""
