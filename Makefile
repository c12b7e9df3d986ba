# The commands of the README and of the daily work; `make` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
TESTFLAGS ?=
TIMEOUT ?= 60m
FUZZTIME ?= 10s
BENCHFLAGS ?=
IMPACTFLAGS ?=

.PHONY: help build demo test drill-ci check bench bench-impact evidence fuzz deps demo-deps clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

build: ## bin/cleancut and bin/umlrun, static
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/ ./cmd/...

demo: demo-deps build ## the whole story on this machine (DEMOFLAGS="--rows N --json")
	bin/cleancut demo $(DEMOFLAGS)

test: deps build ## all tests, also on real devices, arrays and servers (TESTFLAGS="-run X"); CI=true: a skip fails
	go test -json -count=1 -p 3 -timeout $(TIMEOUT) $(TESTFLAGS) ./... | scripts/testlog

drill-ci: deps build ## a small drill, in 3 minutes: what nothing protects must be damaged, the rest sound (DRILLFLAGS="--seed 7")
	scripts/drill-ci

# Needs neither root nor a Debian package. Tests that touch a device, a server or the guest skip under -short.
check: ## the fast inner loop: format, vet, staticcheck, shape of the tree, race tests of what is pure
	@bad=$$(gofmt -l .); [[ -z $$bad ]] || { echo "not formatted, run gofmt -w:"; echo "$$bad"; exit 1; }
	go vet ./...
	go vet -tags fault ./...
	go tool staticcheck ./...
	go test -count=1 -v . | sed '/^ *=== /d; /^ *--- PASS/d; /^PASS$$/d'
	go test -short -timeout 10m $(RACE) ./...

# The race detector needs a C compiler, which a base system does not have.
ifneq ($(shell command -v $${CC:-gcc}),)
RACE := -race
else
RACE :=
$(if $(filter check,$(MAKECMDGOALS)),$(warning no C compiler here: tests run without the race detector))
endif

bench: deps build ## measure; ratios and spreads, nothing passes or fails (BENCHFLAGS="-bench X")
	@echo "machine: $$(uname -srm), $$(nproc) processors, $$(awk '/MemTotal/{printf "%.1f GiB", $$2/1048576}' /proc/meminfo), $$(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1)"
	@echo "version: $(VERSION), $$(go version), $$(ls -d /usr/lib/postgresql/*/bin | tr '\n' ' ')"
	go test -run '^$$' -bench . -count=1 -timeout $(TIMEOUT) $(BENCHFLAGS) ./...

IMPACT := go run -ldflags '-X main.version=$(VERSION)' ./internal/bench/impact

bench-impact: deps build ## what backups cost production, for docs/evidence.md; root, an hour, a quiet machine (IMPACTFLAGS="-repeats N")
	scripts/install-deps --peers || echo "measured without what is missing"
	$(IMPACT) $(IMPACTFLAGS)

evidence: ## docs/evidence.md from the data in docs/evidence
	$(IMPACT) -render

fuzz: ## every fuzz target for a moment (FUZZTIME=10s)
	@grep -r --include='*_test.go' -o '^func Fuzz[A-Za-z0-9_]*' cmd internal | sed 's/:func / /' | while read -r file target; do \
		echo "$$(dirname $$file) $$target"; \
		go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) ./$$(dirname $$file) </dev/null; \
	done

deps: ## what the demo and the tests need from Debian: installed, or listed if that is impossible
	@scripts/install-deps

demo-deps:
	@scripts/install-deps --demo

clean: ## remove what the build made
	rm -rf bin
	go clean -testcache
