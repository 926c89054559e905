"""``gradfilter train``: one training, recorded and resumable."""
