"""Which code the runs of a folder are of, and with which they compare.

Not among the `SOURCES` of a run, so that it can name their hash.
"""

from attention_quality.plan import Record

# Hash of earlier code -> hash of the code with which its runs compare. 933a227e3cdad223 is commit aa88de1, 9ef7ecdbe52aa2be
# is commit 5604623; since then arms and stages were added, and one arm that had no run was removed.
SAME_CODE = {"933a227e3cdad223": "7033599cd9d1a8f6", "9ef7ecdbe52aa2be": "7033599cd9d1a8f6"}


def comparable(record: Record) -> Record:
    """The hashes of data and code that must be equal in two records."""
    return {"generator": record["generator"], "code": SAME_CODE.get(record["code"], record["code"])}
