"""Run tasks on Ray, watch its cluster, and use its Jobs API. The only door to ray."""
