"""evaluate.runtimes"""
