"""Training a student from a teacher."""
