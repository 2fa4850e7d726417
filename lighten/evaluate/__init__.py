"""Measuring perplexity, accuracy, speed and memory of any model, on the runtime that will serve it."""
