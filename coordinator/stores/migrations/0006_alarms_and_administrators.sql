-- Why somebody should look at a device: 'second_use' (its invitation was brought again; it is frozen) or 'two_addresses'
-- (its certificate called from two places at once); NULL where nothing is wrong.
ALTER TABLE devices ADD COLUMN alarm TEXT;
-- Administrators beside the first, whom init makes without a ledger: that one has a row only once it was renewed or revoked.
CREATE TABLE administrators (
  name TEXT PRIMARY KEY,
  key_digest TEXT NOT NULL,      -- SHA-256 of its public key
  state TEXT NOT NULL CHECK (state IN ('active', 'revoked')),
  enrolled_us BIGINT NOT NULL,
  ends_us BIGINT NOT NULL        -- when its newest certificate ends
);
CREATE TABLE administrator_tokens (
  hash TEXT PRIMARY KEY,         -- SHA-256; the token itself is kept nowhere
  name TEXT NOT NULL,
  expires_us BIGINT NOT NULL,
  used_by TEXT                   -- the digest of the key that used it, NULL while nobody has
);
