-- What a person decided of a run, shown in place of its state: '' for nothing.
ALTER TABLE runs ADD COLUMN decision TEXT NOT NULL DEFAULT '' CHECK (decision IN ('', 'paused', 'stopped'));
-- Since when a round is paused; NULL while it is not.
ALTER TABLE rounds ADD COLUMN paused_us BIGINT;
-- Of a buffer: how many releases old the start of an update may be. NULL: a round, whose updates start from its base.
ALTER TABLE rounds ADD COLUMN max_staleness INTEGER;
-- The release that was handed out; NULL: its round's base.
ALTER TABLE assignments ADD COLUMN version INTEGER;
-- The buffer that an update counts in, and how many releases old its start was. NULL: it counts in the round of its task.
ALTER TABLE contributions ADD COLUMN landed INTEGER;
ALTER TABLE contributions ADD COLUMN staleness INTEGER;
CREATE UNIQUE INDEX one_update_a_buffer ON contributions (run, landed, device) WHERE landed IS NOT NULL;
CREATE INDEX tasks_under_way ON assignments (run, device) WHERE state = 'offered';
-- At most one generation of a run takes updates: sealed buffers may wait behind it.
DROP INDEX one_live_round;
CREATE UNIQUE INDEX one_open_round ON rounds (run) WHERE state = 'open';
