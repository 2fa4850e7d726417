"""What leaves the machine or the version's directory: reports in other forms, and artifacts with their cards."""
