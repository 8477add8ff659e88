-- Updates under way. A part is a blob of its own; these rows alone say which are whose, and in which order.
CREATE TABLE uploads (
  id TEXT PRIMARY KEY,           -- 128 random bits, hexadecimal
  run TEXT NOT NULL,
  number INTEGER NOT NULL,
  attempt INTEGER NOT NULL,
  device TEXT NOT NULL,
  digest TEXT NOT NULL,
  size BIGINT NOT NULL,
  received BIGINT NOT NULL,
  expires_us BIGINT NOT NULL,
  UNIQUE (run, number, attempt, device, digest)
);
CREATE INDEX uploads_by_device ON uploads (device);
CREATE TABLE upload_parts (
  upload TEXT NOT NULL REFERENCES uploads (id),
  start BIGINT NOT NULL,
  digest TEXT NOT NULL,          -- of the blob: the part's heading and its bytes
  PRIMARY KEY (upload, start)
);
