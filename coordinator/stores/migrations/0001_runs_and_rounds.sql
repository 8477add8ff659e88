-- Portable SQL; times are microseconds of the store's clock since 1970.
CREATE TABLE runs (
  name TEXT PRIMARY KEY,
  spec TEXT NOT NULL,            -- canonical JSON of wire.run_spec.RunSpec
  layout TEXT NOT NULL,          -- canonical JSON of wire.delta.Layout
  spec_digest TEXT NOT NULL,
  layout_digest TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('running', 'done', 'failed')),
  detail TEXT NOT NULL DEFAULT '',
  created_us BIGINT NOT NULL
);
CREATE TABLE rounds (
  run TEXT NOT NULL REFERENCES runs (name),
  number INTEGER NOT NULL,
  attempt INTEGER NOT NULL,
  kind TEXT NOT NULL CHECK (kind IN ('train', 'evaluate')),
  base_version INTEGER NOT NULL,
  goal INTEGER NOT NULL,
  minimum INTEGER NOT NULL,
  offers INTEGER NOT NULL,
  length_us BIGINT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('open', 'sealed', 'published', 'abandoned')),
  deadline_us BIGINT,
  offered INTEGER NOT NULL,
  accepted INTEGER NOT NULL,
  PRIMARY KEY (run, number, attempt)
);
-- At most one attempt of a run is alive: two processes that both open the next round collide here.
CREATE UNIQUE INDEX one_live_round ON rounds (run) WHERE state IN ('open', 'sealed');
CREATE TABLE assignments (
  run TEXT NOT NULL,
  number INTEGER NOT NULL,
  attempt INTEGER NOT NULL,
  device TEXT NOT NULL,
  state TEXT NOT NULL CHECK (state IN ('offered', 'accepted', 'left')),
  PRIMARY KEY (run, number, attempt, device)
);
CREATE TABLE contributions (
  run TEXT NOT NULL,
  number INTEGER NOT NULL,
  attempt INTEGER NOT NULL,
  device TEXT NOT NULL,
  digest TEXT NOT NULL,
  size BIGINT NOT NULL,
  weight INTEGER NOT NULL,
  base_digest TEXT NOT NULL,
  release_digest TEXT NOT NULL,
  metrics TEXT NOT NULL,         -- canonical JSON of wire.messages.Metrics
  accepted_us BIGINT NOT NULL,
  PRIMARY KEY (run, number, attempt, device)
);
CREATE TABLE releases (
  run TEXT NOT NULL,
  version INTEGER NOT NULL,
  digest TEXT NOT NULL,
  manifest TEXT NOT NULL,        -- canonical JSON of wire.messages.ReleaseManifest
  attempt INTEGER NOT NULL,      -- the attempt of round `version` that made it; 0 for the initial release
  published_us BIGINT NOT NULL,
  PRIMARY KEY (run, version)
);
CREATE TABLE refusals (
  run TEXT NOT NULL,
  reason TEXT NOT NULL,
  count BIGINT NOT NULL,
  PRIMARY KEY (run, reason)
);
