"""Publish the results of a study: reports, exports, verification, comparison."""
