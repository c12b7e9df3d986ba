package load

import "time"

// HeavyCheckpointEvery is the interval of the lab's heavy case.
const HeavyCheckpointEvery = 4 * time.Second

// HeavySettings returns the server settings ("name=value", each for one `-c`
// of postgres) of the lab's heavy case, in which a skewed cut does the most
// damage: 4 MB of shared buffers, so that pages are written out all the time.
// The case also has a checkpoint every four seconds; checkpoint_timeout
// cannot be set below 30 s, so give Churn CheckpointEvery:
// HeavyCheckpointEvery as well. max_wal_size is left alone, because its least
// value depends on the cluster's segment size.
func HeavySettings() []string {
	return []string{
		"shared_buffers=4MB",
		"checkpoint_timeout=30s",
		"checkpoint_warning=0",
	}
}
