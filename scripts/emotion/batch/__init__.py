"""Files of any size to shards of answers, on one machine or on a cluster; a job that was cut goes on."""
