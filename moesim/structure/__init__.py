"""What a step consists of, as pure data: shapes, groups, schedules and bytes, but no seconds."""
