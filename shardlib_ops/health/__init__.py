"""Every server of every shard is looked at, again and again; what that means is published, and acted upon."""
