package s3test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// Gateway is versitygw, an S3 server of others, as a process of its own over a
// folder.
type Gateway struct {
	Endpoint string
	process  *exec.Cmd
	out      *bytes.Buffer
}

// BuildGateway builds versitygw from tools/versitygw, whose go.mod pins it.
// The first time it takes minutes and needs the module proxy. root is the
// folder of this module.
func BuildGateway(ctx context.Context, root, binary string) error {
	build := exec.CommandContext(ctx, "go", "build", "-C", filepath.Join(root, "tools", "versitygw"), "-o", binary, "github.com/versity/versitygw/cmd/versitygw")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build versitygw: %w\n%s", err, out)
	}
	return nil
}

// StartGateway starts the program over the folder dir, in which it makes the
// bucket, and waits until it answers. ctx's end kills it.
func StartGateway(ctx context.Context, binary, dir string) (*Gateway, error) {
	objects, meta := filepath.Join(dir, "objects"), filepath.Join(dir, "meta")
	for _, folder := range []string{filepath.Join(objects, Bucket), meta} {
		if err := os.MkdirAll(folder, 0o700); err != nil {
			return nil, fmt.Errorf("versitygw: %w", err)
		}
	}
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	g := &Gateway{Endpoint: "http://" + address, out: &bytes.Buffer{}}
	g.process = exec.CommandContext(ctx, binary, "--port", address, "--region", "us-east-1", "--quiet", "--keep-alive", "posix", objects)
	g.process.Env = []string{"ROOT_ACCESS_KEY=" + accessKey, "ROOT_SECRET_KEY=" + secretKey, "HOME=" + dir, "PATH=" + os.Getenv("PATH")}
	g.process.Stdout, g.process.Stderr = g.out, g.out
	g.process.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := g.process.Start(); err != nil {
		return nil, fmt.Errorf("start versitygw: %w", err)
	}
	if err := answers(ctx, address); err != nil {
		_ = g.process.Process.Kill()
		_ = g.process.Wait()
		return nil, fmt.Errorf("versitygw: %w\n%s", err, g.out)
	}
	return g, nil
}

// Stop ends the process.
func (g *Gateway) Stop() error {
	_ = g.process.Process.Kill() // it keeps nothing but files
	var exit *exec.ExitError
	if err := g.process.Wait(); err != nil && !errors.As(err, &exit) {
		return fmt.Errorf("versitygw: %w", err)
	}
	return nil
}

// freeAddress returns a loopback address that nobody listens on. Somebody may
// take it before it is used; then StartGateway fails.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("find a port: %w", err)
	}
	return l.Addr().String(), l.Close()
}

// answers waits until something accepts connections at address.
func answers(ctx context.Context, address string) error {
	ctx, stop := context.WithTimeout(ctx, 30*time.Second)
	defer stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
		if err == nil {
			return c.Close()
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-tick.C:
		}
	}
}
