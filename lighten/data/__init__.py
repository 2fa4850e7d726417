"""Text and multiple-choice sets: built in, from a file, or a hub data set."""
