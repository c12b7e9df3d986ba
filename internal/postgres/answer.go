package postgres

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"cleancut/internal/backup"
)

// Voice is what an address gave that was asked for a server.
type Voice string

// The voices. Only Silent and Other prove that the server looked for is not there.
const (
	Silent   Voice = "nothing listens"
	Wanted   Voice = "the server answers"
	Other    Voice = "another system answers"
	Unclear  Voice = "something listens, and what it is cannot be told"
	Unproven Voice = "no answer, and that proves nothing"
)

// Answer is what one address gave.
type Answer struct {
	Address string `json:"address"` // host:port, or a socket's path
	Voice   Voice  `json:"voice"`
	Detail  string `json:"detail,omitempty"`
}

const (
	knockPatience = 5 * time.Second  // for a TCP connection
	askPatience   = 20 * time.Second // for a session and its answer
)

// Ask looks whether the server with that system identifier answers at the
// addresses of a target: each that its DSN names, by itself. It refuses nothing.
func Ask(ctx context.Context, t Target, system backup.SystemIdentifier) ([]Answer, error) {
	cfg, err := t.config()
	if errors.Is(err, backup.ErrNotFound) { // no postmaster.pid, or a dead one
		return []Answer{{Address: t.DataDirectory, Voice: Silent, Detail: "no server runs in it"}}, nil
	}
	if err != nil {
		return nil, err
	}
	places := [][2]any{{cfg.Host, cfg.Port}}
	for _, f := range cfg.Fallbacks { // the same host once more without TLS, or other hosts
		if p := [2]any{f.Host, f.Port}; !slices.Contains(places, p) {
			places = append(places, p)
		}
	}
	var out []Answer
	for _, p := range places {
		one := cfg.Copy()
		one.Host, one.Port = p[0].(string), p[1].(uint16)
		one.Fallbacks = slices.DeleteFunc(one.Fallbacks, func(f *pgconn.FallbackConfig) bool { return f.Host != one.Host || f.Port != one.Port })
		out = append(out, ask(ctx, one, system)...)
	}
	return out, ctx.Err()
}

// ask knocks at every address of a host, and asks who is there where one opens.
func ask(ctx context.Context, cfg *pgx.ConnConfig, system backup.SystemIdentifier) []Answer {
	network, address := pgconn.NetworkAddress(cfg.Host, cfg.Port)
	addresses := []string{address}
	if network == "tcp" {
		ips, err := net.DefaultResolver.LookupHost(ctx, cfg.Host)
		var dns *net.DNSError
		if errors.As(err, &dns) && dns.IsNotFound {
			return []Answer{{Address: address, Voice: Silent, Detail: "there is no host of that name"}}
		}
		if err != nil {
			return []Answer{{Address: address, Voice: Unproven, Detail: err.Error()}}
		}
		addresses = nil
		for _, ip := range ips {
			addresses = append(addresses, net.JoinHostPort(ip, fmt.Sprint(cfg.Port)))
		}
	}
	var out []Answer
	for _, a := range addresses {
		answer := Answer{Address: a}
		if answer.Voice, answer.Detail = knock(ctx, network, a); answer.Voice == "" {
			answer.Voice, answer.Detail = identify(ctx, cfg, system, network, a)
		}
		out = append(out, answer)
	}
	return out
}

// knock returns no voice where somebody opens.
func knock(ctx context.Context, network, address string) (Voice, string) {
	ctx, cancel := context.WithTimeout(ctx, knockPatience)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
	switch {
	case err == nil:
		_ = conn.Close()
		return "", ""
	case errors.Is(err, syscall.ECONNREFUSED), network == "unix" && errors.Is(err, os.ErrNotExist):
		return Silent, ""
	case network == "tcp" && errors.Is(err, syscall.EADDRNOTAVAIL): // an IPv6 address on a host without
		return Silent, ""
	}
	return Unproven, err.Error()
}

// identify opens a session at exactly that address and asks for its system.
func identify(ctx context.Context, cfg *pgx.ConnConfig, system backup.SystemIdentifier, network, address string) (Voice, string) {
	ctx, cancel := context.WithTimeout(ctx, askPatience)
	defer cancel()
	one := cfg.Copy()
	if network == "tcp" {
		one.LookupFunc = func(context.Context, string) ([]string, error) {
			ip, _, err := net.SplitHostPort(address)
			return []string{ip}, err
		}
	}
	conn, err := pgx.ConnectConfig(ctx, one)
	if err != nil {
		return Unclear, err.Error()
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	var got int64
	if err := conn.QueryRow(ctx, `SELECT system_identifier FROM pg_catalog.pg_control_system()`).Scan(&got); err != nil {
		return Unclear, err.Error()
	}
	if backup.SystemIdentifier(got) == system {
		return Wanted, fmt.Sprintf("system %d", system)
	}
	return Other, fmt.Sprintf("system %d", got)
}
