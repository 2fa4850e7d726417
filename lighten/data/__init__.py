"""Text and multiple-choice tasks: built in, from a file, or from a hub data set."""
