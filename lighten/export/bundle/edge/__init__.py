"""export.bundle.edge"""
