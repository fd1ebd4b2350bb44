"""What is written from result files: pages, plots, tables, comparisons, and the console."""
