"""Does MMCA pay? A controlled experiment; see README.md."""
