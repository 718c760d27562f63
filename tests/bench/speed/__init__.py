"""What the benchmarks through a real server share: prompts, servers, load, records."""
