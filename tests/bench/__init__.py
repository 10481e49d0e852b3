"""`make bench`: how fast Earshot is, beside its peers, in the same process and minute."""
