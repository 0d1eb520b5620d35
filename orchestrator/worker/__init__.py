"""The work that runs on a worker: fetch the parent, run the job, commit the result."""
