-- Who may take part. Portable SQL; times are microseconds of the store's clock since 1970.
CREATE TABLE owners (
  name TEXT PRIMARY KEY,
  quota BIGINT NOT NULL          -- how many devices it may have
);
CREATE TABLE enrolment_tokens (
  hash TEXT PRIMARY KEY,         -- SHA-256; the token itself is kept nowhere
  owner TEXT NOT NULL REFERENCES owners (name),
  expires_us BIGINT NOT NULL,
  used_by TEXT                   -- the device, NULL while nobody has used it
);
CREATE TABLE devices (
  name TEXT PRIMARY KEY,
  owner TEXT NOT NULL REFERENCES owners (name),
  key_digest TEXT NOT NULL,      -- SHA-256 of its public key
  state TEXT NOT NULL CHECK (state IN ('active', 'revoked')),
  enrolled_us BIGINT NOT NULL,
  ends_us BIGINT NOT NULL        -- when its newest certificate ends
);
CREATE TABLE release_signatures (
  release TEXT PRIMARY KEY,      -- the manifest's digest
  signature TEXT NOT NULL        -- Ed25519, hexadecimal
);
