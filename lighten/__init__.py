"""Turn a causal language model into the artifact that fits, and measure what it cost."""
