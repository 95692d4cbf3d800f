# What people type. Each target installs what it needs (Debian 12) and says so; nothing is installed twice.
.PHONY: help setup demo test test-faults test-walls bench bench-mover bench-reads bench-outage dist clean

help:
	@echo "make demo   the main job on a sample cluster: back up, export, load, compare"
	@echo "make test   every test"
	@echo "make test-faults  every fault at every step of an export over three machines (half an hour; needs root)"
	@echo "make test-walls  every kind of backup with tablespaces in its WAL, beside production that nothing may touch (some minutes; needs root)"
	@echo "make bench  bytes and times on a cluster of 4.7 GB (needs 25 GB of disk)"
	@echo "make bench-mover  delivery to another machine against rsync over ssh, both on this one (needs 10 GB of memory, 5 GB of disk)"
	@echo "make bench-reads  reads through a mount on a staging server against ssh cat, both on this machine (needs 10 GB of disk)"
	@echo "make bench-outage  what a cut link and a dead server cost in the middle of a large dump (needs 20 GB of disk)"
	@echo "make dist   static binary, manual pages, completions, checksums below dist/"
	@echo "make setup  only install what the others need"

setup:
	@scripts/setup

demo: setup
	@scripts/demo

test: setup
	cargo nextest run --workspace

# Prints the table of docs/semantics.md.
test-faults: setup
	cargo test --locked --package pgthaw --test machines -- --ignored --nocapture every_fault_at_every_step

test-walls: setup
	cargo test --locked --package pgthaw --test walls -- --ignored --nocapture every_kind_of_backup

bench: setup
	@scripts/bench

bench-mover: setup
	cargo run --locked --release --package pgthaw-mover --example bench_mover -- /dev/shm 4 5 /var/tmp

bench-reads: setup
	@scripts/bench-reads

bench-outage: setup
	@scripts/bench-outage

dist:
	@scripts/dist

clean:
	cargo clean
	rm -rf dist
