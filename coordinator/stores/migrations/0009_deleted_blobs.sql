-- Blobs that a sweep takes away. The row is there before the blob goes, and stays for a day: whoever put the blob before, and
-- names it after, may not.
CREATE TABLE deleted_blobs (
  digest TEXT PRIMARY KEY,
  sweep TEXT NOT NULL,           -- 64 random bits, hexadecimal
  marked_us BIGINT NOT NULL,
  gone_us BIGINT                 -- when the sweep had deleted it; until then it is about to
);
