-- The earliest edition of run specs that can say this run. A replica leaves alone what is beyond its own, and hands no task
-- of it to a device that says it reads earlier ones only.
ALTER TABLE runs ADD COLUMN edition INTEGER NOT NULL DEFAULT 1;
