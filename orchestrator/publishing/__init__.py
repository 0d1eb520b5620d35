"""Show and ship what a study found: reports, exports, verification, comparison."""
