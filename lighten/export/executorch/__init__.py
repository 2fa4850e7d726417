"""Export to ExecuTorch: a program with its cache inside, for phones and small boards."""
